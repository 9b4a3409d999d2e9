"""Images that are too small for the size they are trained at."""

from __future__ import annotations

from collections.abc import Iterator

from library.data.quality.folder import Data, Finding, Folder, Item, Level, Picture

MUCH = 2.0  # times in width and height: three of four pixels are then made up


def check(folder: Folder, data: Data) -> Iterator[Finding]:
    """Images without a bucket, those that are enlarged much, and those that are enlarged a little."""
    whole = len(folder.pictures)
    homeless = [picture for picture in folder.pictures if picture.placement is None]
    if homeless:
        yield Finding(
            "too small for a bucket",
            Level.MUST,
            f"{len(homeless)} of {whole} images are too small or too narrow for bucket_no_upscale",
            "leave them out, or give a smaller bucket_reso_steps",
            tuple(Item(picture.path, _pixels(picture)) for picture in homeless),
        )
    enlarged = sorted(
        (picture for picture in folder.pictures if _grows(picture)), key=lambda picture: -picture.enlargement
    )
    much = [picture for picture in enlarged if picture.enlargement >= MUCH]
    little = [picture for picture in enlarged if picture.enlargement < MUCH]
    if much:
        yield Finding(
            "enlarged much",
            Level.SHOULD,
            f"{len(much)} of {whole} images are enlarged {MUCH:g} times or more, up to {much[0].enlargement:.1f} times",
            "the LoRA learns their lack of detail: find larger ones, leave them out (skip_image_resolution) or train "
            "at their size (bucket_no_upscale)",
            tuple(Item(picture.path, _growth(picture)) for picture in much),
        )
    if little:
        yield Finding(
            "enlarged",
            Level.NOTE,
            f"{len(little)} of {whole} images are enlarged, up to {little[0].enlargement:.2f} times",
            "bucket_no_upscale trains them at their own size",
            tuple(Item(picture.path, _growth(picture)) for picture in little),
        )


def _grows(picture: Picture) -> bool:
    """Whether it is enlarged in width or height by more than a pixel's rounding."""
    if picture.placement is None:
        return False
    pairs = zip(picture.placement.resized, picture.size, strict=True)
    return any(after > before + 1 for after, before in pairs)


def _pixels(picture: Picture) -> str:
    return f"{picture.size[0]} × {picture.size[1]}"


def _growth(picture: Picture) -> str:
    assert picture.placement is not None
    width, height = picture.placement.resized
    return f"{_pixels(picture)} to {width} × {height}, {picture.enlargement:.2f} times"
