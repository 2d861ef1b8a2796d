"""Images and captions → batches whose content and order depend on (seed, epoch, sample id) alone.

Nothing of the network, of features or of training may enter it.
"""
