"""The web page: draw, compare models, watch runs. Only what the page and its server need may enter it; what a program
in Python could want belongs to a room below."""
