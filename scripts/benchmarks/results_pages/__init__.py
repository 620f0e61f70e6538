"""Tables and pictures of results: what the scripts beside this folder print, write and draw."""
