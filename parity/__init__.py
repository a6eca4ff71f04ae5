"""The same weights in fastsae and in other libraries: code, reconstruction, loss, gradients.

    python -m parity                # prints a table; exits 1 where equal ones differ

With V = sum |x - mean x|^2 of the batch and unit^2 = V / (n d_in), a peer's loss becomes fastsae's:

    sum_d e^2, mean over tokens     times n / V       is  fvu
    lambda of an L1 penalty         coefficient unit      (values are in units of `unit`)
    lambda of an L0 penalty         coefficient unit^2
    weight of an auxiliary loss     auxk_alpha V / n       if theirs has fastsae's denominator, else
                                    auxk_alpha V / V_res,  V_res = sum |e - mean e|^2

so every comparison is between two numbers, at TOLERANCE. What a peer defines differently gets its
own row, with the measured ratio peer / fastsae; if the reason determines that ratio, it is checked
too.

The other libraries are optional: pip install eai-sparsify dictionary-learning sae-lens
"""

from __future__ import annotations
