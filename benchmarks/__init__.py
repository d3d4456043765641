"""Measurements, which print tables and assert nothing. Run from the repository's root, by module name:

    python -m benchmarks.engine.workload

``engine`` measures whole engines, ``kernels`` steps and operations, ``adapters`` reads and slot writes,
``server`` the HTTP server and metrics, ``policies`` scheduling decisions and published results in simulation,
``attacks`` what harmful requests do to a client beside them, ``peers`` other engines on the same work.
"""
