"""GPU kernels without the GPU: emitted by Inductor, compiled by Triton, read, modelled.

All private parts of torch and Triton that this needs are in this room: ``absent_gpu.py`` lets both
find a GPU that is not there, ``capture.py`` takes the graphs, ``emit.py`` reads what Inductor makes
of them, ``machine_code.py`` what Triton makes of that.
"""
