"""The benchmark suite: `python -m fastseq bench [family ...]` (see cli.py for the options).

families.py    the registry: a family is a table of cases, a builder, bars and end-to-end jobs
recurrent.py   the family "rnn": its cases; recurrent_torch.py and recurrent_peers.py build the
               contenders of a case, all from the same weights; recurrent_bars.py its bars
attention.py   the family "attention", in files of the same names; attention_memory.py: its job
               that measures the peak of memory
linear_scan.py the family "linear_scan", its bars; linear_scan_peers.py its contenders
training.py    the family "training": gradient clipping
charlm.py      end-to-end job of "rnn": a character-level language model on real text
translm.py     end-to-end job of "attention": the same by a Transformer, and generation
lm.py          what the two share: the text, models that take turns, how their losses may differ
leaks.py       memory left behind by thousands of calls (full profile)
runtimes.py    ONNX Runtime and OpenVINO with the settings that every family shares
gate.py        no time without a right result
measure.py     contenders take turns inside one run; ratios pair by pair; the self-test
ceiling.py     what this machine can do: a large product, a read of the same working set
runner.py      from a case to a row; session.py: one run of a family, with progress
bars.py        verdicts; report.py plot.py machine.py: tables, JSON, PNG, where it ran
test_bench.py  the same cases under pytest-benchmark
"""
