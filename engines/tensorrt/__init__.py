"""TensorRT: engines built from a bundle's graphs, ahead of time or on the device, and run on GPUs.

- `flavour`: which TensorRT; the only place that imports one.
- `profiles`: for which shapes engines are built; numbers alone.
- `network`: a graph as a TensorRT network, checked.
- `builder`: networks to engines in a bundle's `devices/`.
- `records`: what an engine says of itself, and whether it still holds.
- `engine`: runs them, by `calls`; on `cuda`, what a GPU can do, and `buffers`, memory that it and the host share.
- `logs`: what TensorRT says.
"""
