"""A ring of generated images, so that many student steps share one costly generator batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.types import Images


class ImagePool:
    """The latest ``capacity`` images [N, C, H, W] and their labels [N]; the oldest leave first."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._added = 0
        self._ring: Images | None = None  # allocated when the first batch tells the image's shape

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Keep a batch, [B, C, H, W] and [B], in the places of the oldest images."""
        images, labels = images[-self.capacity :].detach(), labels[-self.capacity :]
        if self._ring is None:
            self._ring = Images(
                images.new_empty(self.capacity, *images.shape[1:]), labels.new_empty(self.capacity)
            )
        places = torch.arange(self._added, self._added + len(labels), device=labels.device)
        places %= self.capacity
        self._ring.images[places], self._ring.labels[places] = images, labels
        self._added += len(labels)

    def all(self) -> Images:
        """Every image kept, a view."""
        if self._ring is None:
            raise ValueError("the pool is empty; add a batch first.")
        return Images(self._ring.images[: len(self)], self._ring.labels[: len(self)])

    def sample(self, batch_size: int, rng: torch.Generator) -> Images:
        """``batch_size`` images drawn with replacement by ``rng``, a CPU generator."""
        images, labels = self.all()
        index = torch.randint(len(self), (batch_size,), generator=rng).to(labels.device)
        return Images(images[index], labels[index])


def augment(images: Tensor, shift: int | None, rng: torch.Generator) -> Tensor:
    """Flip about half of the images and move all by up to ``shift`` pixels; [B, C, H, W].

    ``None`` leaves them as they are.
    Edges are mirrored, so that no border appears that the teacher never saw. ``rng`` is a CPU
    generator: the size of the crop's margins must be known to the host.
    """
    if shift is None:
        return images
    batch, _, height, width = images.shape
    flip = (torch.rand(batch, generator=rng) < 0.5).to(images.device)
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    if shift == 0:
        return images
    padded = F.pad(images, (shift,) * 4, mode="reflect")
    top, left = torch.randint(2 * shift + 1, (2,), generator=rng).tolist()
    return padded[:, :, top : top + height, left : left + width]
