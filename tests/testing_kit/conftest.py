"""The fixtures that the library gives to pytest, also where its metadata was installed before it had any."""

from kasmina_pytest import kasmina_device, kasmina_fake_distribution, kasmina_registry, kasmina_repeatable

__all__ = ["kasmina_device", "kasmina_fake_distribution", "kasmina_registry", "kasmina_repeatable"]
