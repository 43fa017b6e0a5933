"""DSpark Edge's runtime: generation from a bundle, in pure Python on numpy and one inference backend."""

from dspark_edge.engines.errors import DSparkError
from dspark_edge.runtime.chat_template import Message
from dspark_edge.runtime.generator import MODES, Generation, Generator, GeneratorOptions, Piece
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.runtime.statistics import Statistics

__all__ = [
    "MODES",
    "DSparkError",
    "Generation",
    "Generator",
    "GeneratorOptions",
    "Message",
    "Piece",
    "SamplingParams",
    "Statistics",
]
