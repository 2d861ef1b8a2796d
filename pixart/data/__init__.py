"""Images and captions → batches whose content and order depend on (seed, epoch, sample id) alone."""
