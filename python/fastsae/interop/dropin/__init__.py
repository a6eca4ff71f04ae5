"""fastsae's kernels inside the trainers of other libraries, which keep their configs and files.

    from fastsae.interop.dropin import sae_lens as fast
    fast.register()

and likewise `sparsify.enable()` and the trainers of `dictionary_learning`. Each module imports the
library it is named after, so import only the one that you have; nothing else imports them.
"""
