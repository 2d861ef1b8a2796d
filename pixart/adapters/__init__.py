"""What is trained on top of a network that stays as it is: one file each, on `model/`, which never mentions them.

Nothing of data or of the training loop may enter it.
"""

from pixart.adapters.lora import Lora

__all__ = ["Lora"]
