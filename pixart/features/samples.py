"""Samples of feature stores; the same as `pixart.data.samples` makes from images, with latents in place of pixels."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from pixart.data.batches import Key
from pixart.data.images import choose
from pixart.data.samples import Drawing
from pixart.features.store import FeatureStore


class FeatureDataset(Dataset):
    """Samples of several feature stores in sequence, by (epoch, index) keys; see `Batch` for their content."""

    by_epoch = True  # keys are (epoch, index), see `pixart.data.given.TrainingData`

    def __init__(
        self,
        stores: Sequence[FeatureStore],
        chosen: Sequence[np.ndarray | None],
        drawing: Drawing,
        *,
        flip: bool = False,
        posterior_mean: bool = False,
    ):
        """
        Args:
            chosen: the samples to use from each store, by number; None means all.
            drawing: draws the samples' random numbers.
            flip: use the mirrored image's latents half of the time.
            posterior_mean: use the mean of the autoencoder's posterior instead of a sample from it.
        """
        self.stores, self.chosen, self.drawing = stores, chosen, drawing
        self.flip, self.posterior_mean = flip, posterior_mean
        self.sizes = [len(store) if part is None else len(part) for store, part in zip(stores, chosen, strict=True)]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, key: Key) -> dict:
        epoch, index = key
        which = 0
        while index >= self.sizes[which]:
            index, which = index - self.sizes[which], which + 1
        store, chosen = self.stores[which], self.chosen[which]
        number = index if chosen is None else int(chosen[index])
        sample = store.get(number)
        draws = self.drawing(epoch, sample.id, tuple(sample.mean.shape))
        mirrored = self.flip and bool(draws.uniform("flip") < 0.5)
        if mirrored:
            sample = store.get(number, mirrored=True)
        latents = sample.mean
        if not self.posterior_mean:
            latents = latents + sample.std * draws.normal("posterior_noise", *draws.latent)
        caption = store.caption(choose(sample.captions, sample.weights, float(draws.uniform("caption"))))
        problem = None
        if not len(caption):
            caption, problem = caption.new_zeros(1, caption.shape[1]), "its caption has no tokens"
        arrays = {name: store.array(name, number, mirrored=mirrored) for name in self.drawing.extras.arrays}
        return {"latents": latents, "caption": caption, **self.drawing.common(draws, sample, arrays, problem)}
