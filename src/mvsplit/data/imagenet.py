"""ImageNet as torchvision's `ImageNet` unpacks it: `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`."""

from pathlib import Path

from torchvision.datasets import ImageNet

from mvsplit.utils.errors import UserError


def unpack_imagenet(folder: Path, archives: str) -> None:
    """Unpack the official archives into the folder, by torchvision, which verifies them; this takes a while.

    If it fails, the caller removes the folder.

    Args:
        folder: to create.
        archives: folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz.

    Raises:
        UserError: if one of them is missing or not the official one.
    """
    folder.mkdir(parents=True)
    links = [folder / file.name for file in Path(archives).glob("ILSVRC2012_*.tar*")]
    for link in links:
        link.symlink_to(Path(archives, link.name).absolute())
    try:
        for split in ("val", "train"):  # the smaller first: missing archives are reported sooner
            ImageNet(folder, split)
    except RuntimeError as error:
        raise UserError(f"data.prepare.archives = {archives}: {str(error).partition('You need')[0]}") from None
    for link in links:
        link.unlink()
