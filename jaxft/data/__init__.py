"""Data: what a source of images gives the rest of the project, and what a run makes of it."""

from jaxft.data.dataset import Dataset, Images
from jaxft.data.inputs import Augment, Inputs, Order, overlap

__all__ = ["Augment", "Dataset", "Images", "Inputs", "Order", "overlap"]
