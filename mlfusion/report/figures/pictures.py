"""A strip of pictures as a figure: each image, and below it the image with its map of attention."""

from mlfusion.report.figures.drawing import Figure, Panel, charted, finished, needs_altair
from mlfusion.report.pictures import Picture, Strip, data_url

SIDE_PX = 150
DRAWN_PX = 300


def strip_figure(strip: Strip) -> Figure:
    """The pictures beside each other; those with a map stand above their own map drawn."""
    maps = any(picture.attention is not None for picture in strip.pictures)
    records = []
    for i, picture in enumerate(strip.pictures):
        x = i % 6 * (SIDE_PX + 14)
        y = i // 6 * ((SIDE_PX + 8) * (1 + maps) + 26)
        plain = Picture(picture.image)
        records.append({"what": "image", "x": x, "y": y, "url": data_url(plain, DRAWN_PX, kind="png")})
        if picture.attention is not None:
            below = y + SIDE_PX + 8
            records.append({"what": "image", "x": x, "y": below, "url": data_url(picture, DRAWN_PX, kind="png")})
        at = y + (SIDE_PX + 8) * (1 + maps) + 6
        records.append({"what": "caption", "x": x, "y": at, "text": picture.caption})
    wide, high = max(r["x"] for r in records) + SIDE_PX, max(r["y"] for r in records) + 14  # type: ignore[type-var,operator]
    alt = needs_altair()
    base = charted()
    scales = [alt.Scale(domain=[0, end], range=[0, end], nice=False, zero=False) for end in (wide, high)]
    x_at, y_at = alt.X("x:Q", axis=None, scale=scales[0]), alt.Y("y:Q", axis=None, scale=scales[1])
    chart = alt.layer(
        base.transform_filter("datum.what == 'image'")
        .mark_image(width=SIDE_PX, height=SIDE_PX, align="left", baseline="top")
        .encode(x=x_at, y=y_at, url="url:N"),
        base.transform_filter("datum.what == 'caption'")
        .mark_text(style="name", align="left", baseline="middle", limit=SIDE_PX + 10)
        .encode(x=x_at, y=y_at, text="text:N"),
    )
    panel = Panel("", finished(chart, int(high)), records, width=int(wide))  # type: ignore[arg-type]
    captions = [picture.caption for picture in strip.pictures]
    numbers = [{"place": i + 1, "caption": caption} for i, caption in enumerate(captions)]
    said = f"{strip.says} {'; '.join(captions)}"
    return Figure(strip.name, strip.title, strip.says, said, [panel], numbers, columns=1)  # type: ignore[arg-type]
