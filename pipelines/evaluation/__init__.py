"""How good a trained run is: reconstructions, samples, and the settings that sample best."""
