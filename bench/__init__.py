"""The benchmark suite: `python -m fastseq bench [family ...]` (see cli.py for the options).

families.py    the registry: a family is a table of cases, a builder, bars and end-to-end jobs
recurrent.py   the family "rnn": its cases; recurrent_torch.py and recurrent_peers.py build the
               contenders of a case, all from the same weights; recurrent_bars.py its bars
charlm.py      its end-to-end job: a character-level language model on real text
leaks.py       memory left behind by thousands of calls (full profile)
gate.py        no time without a right result
measure.py     contenders take turns inside one run; ratios pair by pair; the self-test
ceiling.py     what this machine can do: a large product, a read of the same working set
runner.py      from a case to a row; session.py: one run of a family, with progress
bars.py        verdicts; report.py plot.py machine.py: tables, JSON, PNG, where it ran
test_bench.py  the same cases under pytest-benchmark
"""
