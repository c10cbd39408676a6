"""Lets verl 0.7.0's SFT trainer start on text where the real package cannot be installed.

That release imports qwen_vl_utils for images when it starts (0.7.1 on: when there is an image), and the package needs
torchvision, which has no build for a CPU-only torch.  Text never calls these functions.
"""

from typing import Any, NoReturn


def fetch_image(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError("this stand-in has no images: install qwen_vl_utils and torchvision")


fetch_video = fetch_image
