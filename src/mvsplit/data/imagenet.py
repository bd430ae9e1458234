"""ImageNet as torchvision's `ImageNet` unpacks it: `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`."""

import shutil
from pathlib import Path

from torchvision.datasets import ImageNet

from mvsplit.utils.errors import UserError


def unpack_imagenet(folder: Path, archives: str) -> None:
    """Unpack the official archives into the folder, by torchvision, which verifies them; this takes a while.

    Args:
        archives: folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz.

    Raises:
        UserError: if one of them is missing or not the official one.
    """
    folder.mkdir(parents=True)
    links = [folder / file.name for file in Path(archives).glob("ILSVRC2012_*.tar*")]
    for link in links:
        link.symlink_to(Path(archives, link.name).absolute())
    try:
        for split in ("val", "train"):  # the smaller first: what is missing is told sooner
            ImageNet(folder, split)
    except BaseException as error:
        shutil.rmtree(folder)  # half of it is of no use
        if isinstance(error, RuntimeError):
            raise UserError(f"data.prepare.archives = {archives}: {str(error).partition('You need')[0]}") from None
        raise
    for link in links:
        link.unlink()
