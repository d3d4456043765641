"""GPU kernels in Triton; :mod:`aioengine.kernels.triton.lora` is the backend. Needs triton to be imported."""
