"""One file for each noun of the wire. A route reads its request, calls what decides or acts, and writes the reply."""
