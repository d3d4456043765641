"""Measurements, which print tables and assert nothing. Run from the repository's root, by module name:

    python -m benchmarks.engine.workload

``engine`` measures whole engines, ``kernels`` steps and operations, ``adapters`` reads and slot writes,
``server`` the HTTP server and metrics, ``policies`` scheduling decisions and published results in simulation,
``attacks`` what harmful requests do to a client beside them, ``endurance`` leaks and bad days;
``beside_peers`` runs other engines on the same work, with what ``peers`` has of each.
"""
