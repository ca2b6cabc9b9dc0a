"""Weight formats for qmoe_plugin that are not in its own tree."""
