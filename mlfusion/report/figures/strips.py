"""A strip of pictures as a figure: each image, and below it the image with its attention map."""

from mlfusion.report.figures import charts
from mlfusion.report.figures.drawing import Figure, Panel, Record
from mlfusion.report.pictures import Picture, Strip, data_url
from mlfusion.system.text import one_line

SIDE_PX = 150  # side of a picture in the figure
PIXELS = 300  # side of a picture in its file
COLUMNS = 6


def strip_figure(strip: Strip) -> Figure:
    """The pictures in a row; below each picture its attention map, if it has one."""
    rows = 1 + any(picture.attention is not None for picture in strip.pictures)
    step, below = SIDE_PX + 14, SIDE_PX + 8
    captions = [one_line(picture.caption) for picture in strip.pictures]
    records = []
    for i, picture in enumerate(strip.pictures):
        x, y = i % COLUMNS * step, i // COLUMNS * (below * rows + 26)
        records.append(Record(what="image", x=x, y=y, url=data_url(Picture(picture.image), PIXELS, kind="png")))
        if picture.attention is not None:
            records.append(Record(what="image", x=x, y=y + below, url=data_url(picture, PIXELS, kind="png")))
        records.append(Record(what="caption", x=x, y=y + below * rows + 6, text=captions[i]))
    width = round(max(record.number("x") for record in records)) + SIDE_PX
    height = round(max(record.number("y") for record in records)) + 14
    return Figure(
        strip.name,
        one_line(strip.title),
        one_line(strip.description),
        f"{one_line(strip.description)} {'; '.join(captions)}",
        [Panel("", _spec(width, height), records, width=width)],
        [Record(place=i, caption=caption) for i, caption in enumerate(captions, 1)],
        columns=1,
    )


def _spec(width: int, height: int) -> dict[str, object]:
    alt = charts.require_altair()
    x = alt.X("x:Q", axis=None, scale=charts.pixel_scale(width))
    y = alt.Y("y:Q", axis=None, scale=charts.pixel_scale(height))
    image = charts.of_kind("image").mark_image(width=SIDE_PX, height=SIDE_PX, align="left", baseline="top")
    text = charts.of_kind("caption").mark_text(style="name", align="left", baseline="middle", limit=SIDE_PX + 10)
    return charts.to_spec(alt.layer(image.encode(x=x, y=y, url="url:N"), text.encode(x=x, y=y, text="text:N")), height)
