"""What the tests of the ops share.

dtypes.py     the three activation types in numpy, ONNX and ONNX Runtime
models.py     one-node models, with weights inside or in an external file
run.py        sessions, and runs that take and give bfloat16
weights.py    random weights of any format, with their scales
layouts.py    the layouts in which models store weights
cases.py      a QMoE or MatMulNBits node as data: options in, tensors, model and expected result out
bad.py        a node with one thing wrong, and what must be said of it
tolerance.py  how far a result may be from the oracle, and why
devices.py    where tests can run, and what is missing where they cannot
"""
