"""Images and captions → batches whose content and order depend only on (seed, epoch, sample id).

Nothing of the network, of features or of training may enter it.
"""
