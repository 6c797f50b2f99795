"""`dsmoe report MODEL`: what a sparse model does with a text, as one HTML page without a server."""
