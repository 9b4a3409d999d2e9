"""The options about images and captions, with kohya's names, defaults and meanings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import MAX_SIDE, option, read_range, read_resolution, read_skipped_resolution
from library.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Images and captions"""

    train_data_dir: str | None = option(None, help="the folder that holds the image folders, named like 10_name")
    reg_data_dir: str | None = option(None, help="the same for regularisation images")
    in_json: str | None = option(
        None, help="a JSON or JSONL file of captions and tags by image, instead of caption files in numbered folders"
    )
    dataset_config: str | None = option(None, help="a TOML or JSON file that describes the data, instead of all these")
    resolution: tuple[int, int] | None = option(
        None, read=read_resolution, joined_by=",", help="the size to train at in pixels: 512, or 512,768 (width,height)"
    )
    train_batch_size: int = option(1, minimum=1, help="images per step and device")
    enable_bucket: bool = option(False, help="train images of different aspect ratios at different sizes")
    min_bucket_reso: int = option(256, minimum=1, maximum=MAX_SIDE, help="the shortest side of a bucket in pixels")
    max_bucket_reso: int = option(1024, minimum=1, maximum=MAX_SIDE, help="the longest side of a bucket in pixels")
    bucket_reso_steps: int = option(
        64, minimum=1, maximum=MAX_SIDE, help="sides of buckets are multiples of this many pixels"
    )
    skip_image_resolution: tuple[int, int] | None = option(
        None,
        read=read_skipped_resolution,
        joined_by=",",
        help="leave out images whose area is at most that of this size, such as 512 or 512,768: in a data set's file, "
        "for a data set of a higher resolution beside another one",
    )
    bucket_no_upscale: bool = option(False, help="never enlarge an image; its size decides about its bucket")
    caption_extension: str = option(
        ".caption", aliases=("caption_extention",), help="ending of the caption files; most data sets have .txt"
    )
    caption_separator: str = option(",", help="what stands between the parts of a caption", free_text=True)
    shuffle_caption: bool = option(False, help="shuffle the parts of a caption each time")
    keep_tokens: int = option(0, minimum=0, help="so many parts at the front are never moved, held back or dropped")
    keep_tokens_separator: str = option(
        "",
        help="what stands behind the parts to keep, such as |||, instead of a number; a second one keeps the end",
        free_text=True,
    )
    secondary_separator: str | None = option(
        None,
        help="what stands within a part, such as ;;;, and becomes --caption_separator at the end",
        free_text=True,
    )
    enable_wildcard: bool = option(False, help="draw one of {a|b|c} in captions, and one line of those with several")
    caption_prefix: str | None = option(None, help="text before every caption", free_text=True)
    caption_suffix: str | None = option(None, help="text behind every caption", free_text=True)
    caption_dropout_rate: float = option(0.0, minimum=0, maximum=1, help="share of captions that are left empty")
    caption_dropout_every_n_epochs: int = option(0, minimum=0, help="leave all captions empty in each n-th epoch")
    caption_tag_dropout_rate: float = option(0.0, minimum=0, maximum=1, help="share of parts that are left out")
    token_warmup_min: int = option(1, minimum=0, help="so many parts at the start of --token_warmup_step")
    token_warmup_step: float = option(
        0.0, minimum=0, help="begin with few parts and have all after so many steps, or after this share of all below 1"
    )
    flip_aug: bool = option(False, help="mirror images half of the time; not for faces or text")
    color_aug: bool = option(False, help="change hue or brightness a little, a third of the time")
    random_crop: bool = option(False, help="cut images anywhere instead of in the middle, anew each time")
    face_crop_aug_range: tuple[float, float] | None = option(
        None,
        read=read_range,
        joined_by=",",
        help="without buckets: cut about the face that the file name tells, 2.0,4.0 times as large as it",
    )
    resize_interpolation: (
        Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"] | None
    ) = option(None, help="the filter to resize images with (default: area to shrink, lanczos to enlarge)")
    alpha_mask: bool = option(False, help="learn the images' opaque parts only: the alpha channel weighs the loss")
    masked_loss: bool = option(False, help="learn what masks show in white: conditioning_data_dir, or --alpha_mask")
    dataset_repeats: int = option(1, minimum=1, help="repeats of each image per epoch where the data set says nothing")
    prior_loss_weight: float = option(1.0, minimum=0, help="weight of the loss of regularisation images")
    cache_latents: bool = option(False, help="encode each image once, before training")
    cache_latents_to_disk: bool = option(False, help="the same, and keep the result on disk for later runs")
    vae_batch_size: int = option(1, minimum=1, help="images encoded at once for the cache; 1 is fastest on a CPU")
    cache_text_encoder_outputs: bool = option(
        False, help="encode each caption once, before training; needs --network_train_unet_only"
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, help="the same, and keep the result on disk for later runs"
    )
    cache_dir: str | None = option(
        None, help="the folder for what is kept on disk (default: .lora_cache beside the images) (ours)"
    )
    skip_cache_check: bool = option(
        False, help="do not check the contents of files on disk before training, only when they are used"
    )
    text_encoder_batch_size: int | None = option(
        None, minimum=1, zero_is_unset=True, help="captions encoded at once (default: as --train_batch_size)"
    )
    max_data_loader_n_workers: int = option(8, minimum=0, help="processes that prepare data, at most; fewer if enough")
    persistent_data_loader_workers: bool = option(False, help="keep these processes from one epoch to the next")
    skip_bad_images: bool = option(False, help="leave unreadable images out instead of stopping (ours)")

    def __post_init__(self) -> None:
        for name in ("cache_latents", "cache_text_encoder_outputs"):
            if getattr(self, f"{name}_to_disk"):  # which implies it, in kohya's scripts too
                object.__setattr__(self, name, True)
        if self.cache_dir is not None and not self.caches_to_disk:
            raise UserError(
                "--cache_dir says where to keep caches, and nothing is to be kept: add --cache_latents_to_disk or "
                "--cache_text_encoder_outputs_to_disk"
            )

    @property
    def latent_cache_option(self) -> str:
        """The option that asks for a cache of latents, if one does."""
        return "cache_latents_to_disk" if self.cache_latents_to_disk else "cache_latents"

    @property
    def text_cache_option(self) -> str:
        """The option that asks for a cache of texts, if one does."""
        name = "cache_text_encoder_outputs"
        return f"{name}_to_disk" if self.cache_text_encoder_outputs_to_disk else name

    @property
    def caches_to_disk(self) -> bool:
        return self.cache_latents_to_disk or self.cache_text_encoder_outputs_to_disk
