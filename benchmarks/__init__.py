"""Measurements that print tables and assert nothing. Run them from the repository's root, by module name:

    python -m benchmarks.engine.executors

``engine`` measures whole engines, ``kernels`` steps and operations, ``adapters`` reads and slot writes,
``server`` the HTTP server and metrics, ``policies`` scheduling decisions and published results in simulation,
``attacks`` how harmful requests affect another client, ``endurance`` leaks and failures of the machine;
``beside_peers`` runs the same work on other engines, with the scripts in ``peers``; ``gpu`` does everything
that is to be done with a GPU. What they share is in ``shared``: cases that take turns, engines, and tables.
"""
