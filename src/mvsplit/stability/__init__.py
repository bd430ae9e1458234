"""The mean mode: its measures, how they are taken, the detector of a collapse, tables and figures."""
