"""A sanitizer for Triton kernels: ttsem executes the output of Triton's frontend, and checks every access.

``.ci/run ttsem`` runs the kernel tests with the pytest plugin, ``plugin.py``. One file checks one property:
``bounds.py`` that an access is inside a tensor, ``unwritten.py`` that something has written what is read,
``ordering.py`` that programs do not race. ``speed.py`` makes ttsem faster. ``controls.py`` has kernels with
one fault each, which must be reported.
"""
