"""Read and write weights of other projects: their names, layouts and file formats, converted to and
from our models. Nothing that is read is executed."""
