"""Counts in words: one image is no "1 images"."""


def plural(number: int, singular: str, plural_form: str = "") -> str:
    """'1 seed', '2 seeds'; `plural_form` is by default the singular with an s."""
    return f"{number:,} {singular if number == 1 else plural_form or f'{singular}s'}"
