"""One module a command: a path and a recipe in, a frozen result out. Nothing here prints."""
