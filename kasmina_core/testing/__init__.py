"""The conformance kit: what authors of packs and hosts import in their tests.

>>> from kasmina_core.testing import check_host
>>> import torch
>>> host = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
>>> report = check_host(host, torch.randn(2, 3, 4), slots=["0"])
>>> report.raise_if_failed()
>>> print(report.verdict)
passed

The fixtures ``kasmina_registry``, ``kasmina_fake_distribution``, ``kasmina_device`` and ``kasmina_repeatable`` come with
the installed library: pytest finds them by itself.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
