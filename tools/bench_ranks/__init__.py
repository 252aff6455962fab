"""Many real processes walk the path that ranks take on Trainium, with a stand-in for the device."""
