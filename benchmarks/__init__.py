"""Measurements that print numbers and assert nothing.

    python -m benchmarks --list                          every case
    python -m benchmarks engine long_prompt --help       what a case measures, and its options
    python -m benchmarks engine long_prompt --rounds 1

A case is a function: its docstring is its help, and its arguments are its options. It sets up what it
measures, and yields the calls to be measured (:class:`benchmarks.runner.Calls`) or finished tables. The
runner has the calls take turns, takes the times, and prints medians, the least and the most as Markdown.

Rooms: ``engine`` measures whole engines, ``kernels`` steps and operations of the CPU, ``gpu`` those of a GPU,
``adapters`` reads and slot writes, ``server`` HTTP and metrics, ``fleet`` several replicas, ``policies``
scheduling decisions and simulations, ``papers`` published results, and ``peers`` other engines.
"""
