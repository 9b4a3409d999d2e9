"""The options about images and captions, with kohya's names, defaults and meanings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import (
    MAX_SIDE,
    option,
    read_balance,
    read_range,
    read_resolution,
    read_resolutions,
    read_share,
    read_skipped_resolution,
)
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
    resolutions: tuple[tuple[int, int], ...] | None = option(
        None,
        read=read_resolutions,
        joined_by=",",
        help="train every image at each of these sizes, instead of --resolution: 512 768 1024; 512x768 is width and "
        "height (ours)",
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
        help="leave out images whose area is at most that of this size, such as 512 or 512,768; useful in a data set's "
        "file, for a data set of higher resolution beside another one",
    )
    bucket_no_upscale: bool = option(False, help="never enlarge an image; its own size decides its bucket")
    caption_extension: str = option(
        ".caption", aliases=("caption_extention",), help="ending of the caption files; most data sets have .txt"
    )
    caption_separator: str = option(",", help="the separator between the tags of a caption", free_text=True)
    shuffle_caption: bool = option(False, help="shuffle the tags of a caption each time")
    keep_tokens: int = option(0, minimum=0, help="this many tags at the front are never shuffled, held back or dropped")
    keep_tokens_separator: str = option(
        "",
        help="a mark behind the tags to keep, such as |||, instead of a number; a second one keeps the tags at the end",
        free_text=True,
    )
    secondary_separator: str | None = option(
        None,
        help="a separator within a tag, such as ;;;, which becomes --caption_separator after shuffling",
        free_text=True,
    )
    enable_wildcard: bool = option(
        False, help="choose one of {a|b|c} in captions, and one line of those with several, at random each time"
    )
    caption_prefix: str | None = option(None, help="text before every caption", free_text=True)
    caption_suffix: str | None = option(None, help="text behind every caption", free_text=True)
    caption_dropout_rate: float = option(
        0.0, minimum=0, maximum=1, help="share of captions that are replaced by an empty one"
    )
    caption_dropout_every_n_epochs: int = option(
        0, minimum=0, help="replace all captions by empty ones in each n-th epoch"
    )
    caption_tag_dropout_rate: float = option(0.0, minimum=0, maximum=1, help="share of tags that are left out")
    token_warmup_min: int = option(1, minimum=0, help="the number of tags at the start of --token_warmup_step")
    token_warmup_step: float = option(
        0.0,
        minimum=0,
        help="begin with few tags and have all after this many steps, or, below 1, after this share of all steps",
    )
    flip_aug: bool = option(False, help="mirror each image with probability 1/2; not for faces or text")
    color_aug: bool = option(False, help="change hue or brightness a little, with probability 1/3")
    random_crop: bool = option(False, help="crop images at a random place each time instead of in the middle")
    face_crop_aug_range: tuple[float, float] | None = option(
        None,
        read=read_range,
        joined_by=",",
        help="without buckets: crop around the face that the file name gives, 2.0,4.0 times as large as it",
    )
    resize_interpolation: (
        Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"] | None
    ) = option(None, help="the filter to resize images with (default: area to shrink, lanczos to enlarge)")
    alpha_mask: bool = option(False, help="learn the images' opaque parts only: the alpha channel weighs the loss")
    masked_loss: bool = option(False, help="learn only where masks are white: conditioning_data_dir, or --alpha_mask")
    dataset_repeats: int = option(1, minimum=1, help="repeats of each image per epoch where the data set gives none")
    balance: str | None = option(
        None,
        read=read_balance,
        joined_by=",",
        help="how the folders to learn share the draws, instead of by images x repeats: smallest (each as often as the "
        "smallest), equal (as many draws in all as before), or a weight for each, 2,1,1 (ours)",
    )
    reg_share: float | None = option(
        None,
        read=read_share,
        help="the part of all draws that are regularisation images, such as 0.3 (default: half, as many as the others) "
        "(ours)",
    )
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
        None, help="the folder for caches on disk (default: .lora_cache beside the images) (ours)"
    )
    skip_cache_check: bool = option(
        False, help="check the contents of cache files on disk only when they are used, not before training"
    )
    text_encoder_batch_size: int | None = option(
        None, minimum=1, zero_is_unset=True, help="captions encoded at once (default: as --train_batch_size)"
    )
    max_data_loader_n_workers: int = option(
        8, minimum=0, help="at most this many processes that prepare data; fewer if those are enough"
    )
    persistent_data_loader_workers: bool = option(False, help="keep these processes from one epoch to the next")
    skip_bad_images: bool = option(False, help="leave unreadable images out instead of stopping (ours)")

    def __post_init__(self) -> None:
        for name in ("cache_latents", "cache_text_encoder_outputs"):
            if getattr(self, f"{name}_to_disk"):  # implies the cache, in kohya's scripts too
                object.__setattr__(self, name, True)
        if self.resolution is not None and self.resolutions is not None:
            raise UserError("--resolution and --resolutions: give one of them")
        if self.cache_dir is not None and not self.caches_to_disk:
            raise UserError(
                "--cache_dir is the folder of caches on disk, and there are none: add --cache_latents_to_disk or "
                "--cache_text_encoder_outputs_to_disk"
            )

    @property
    def latent_cache_option(self) -> str:
        """The given option that turns on the cache of latents; "" for none."""
        return "cache_latents_to_disk" if self.cache_latents_to_disk else "cache_latents"

    @property
    def text_cache_option(self) -> str:
        """The given option that turns on the cache of texts; "" for none."""
        name = "cache_text_encoder_outputs"
        return f"{name}_to_disk" if self.cache_text_encoder_outputs_to_disk else name

    @property
    def caches_to_disk(self) -> bool:
        return self.cache_latents_to_disk or self.cache_text_encoder_outputs_to_disk
