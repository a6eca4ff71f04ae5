#!/bin/sh
# Compiler launcher: runs the command after it, and keeps what ptxas says about each kernel in
# OBJECT.ptxas, for bench/resources.py. Everything else is passed on.
object=
previous=
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
said=$object.said
"$@" 2>"$said"
status=$?
told='^ptxas info|^ *[0-9]+ bytes stack frame'
grep -E "$told" "$said" >"$object.ptxas"
grep -vE "$told" "$said" >&2
rm -f "$said"
exit $status
