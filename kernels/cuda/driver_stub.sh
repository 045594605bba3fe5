#!/usr/bin/env bash
# driver_stub.sh TOOLKIT OUT: makes OUT/libcuda.a, which stands in for the driver
# when a program is linked. It holds a jump for every function of the toolkit's
# cuda.h and finds the real ones in libcuda.so.1 when the program starts. So the
# program links where no driver is installed, starts there too, and can say what is missing
# (gorgonia.org/cu ends the process when cuInit fails; here it never does, and
# trainerd_driver_status tells).
set -euo pipefail
toolkit=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
names=$(printf '#include <cuda.h>\n' | gcc -E -P -I "$here/compat" -I "$toolkit/include" - | tr '\n' ' ' |
  grep -oE '\bCUresult +cu[A-Z][A-Za-z0-9_]* *\(' | grep -oE 'cu[A-Z][A-Za-z0-9_]*' | sort -u)
[ "$(wc -w <<<"$names")" -gt 300 ] || { echo "driver_stub: only $(wc -w <<<"$names") functions found in $toolkit/include/cuda.h" >&2; exit 1; }
case $(uname -m) in
  x86_64) jump() { echo "	jmp *trainerd_slots+$((8 * $1))(%rip)"; } ;;
  aarch64) jump() { printf '	adrp x16, trainerd_slots+%d\n	ldr x16, [x16, :lo12:trainerd_slots+%d]\n	br x16\n' $((8 * $1)) $((8 * $1)); } ;;
  *) echo "driver_stub: no jumps for $(uname -m)" >&2; exit 1 ;;
esac
{
  echo '	.text'
  i=0
  for n in $names; do
    if [ "$n" != cuInit ]; then
      printf '	.globl %s\n	.type %s, %%function\n%s:\n' "$n" "$n" "$n"
      jump $i
    fi
    i=$((i + 1))
  done
  echo '	.section .note.GNU-stack,"",%progbits'
} >"$out/jumps.s"
{
  cat <<'C'
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
static int missing(void) { return 3; /* CUDA_ERROR_NOT_INITIALIZED */ }
static const char *const names[] = {
C
  for n in $names; do echo "	\"$n\","; done
  cat <<'C'
};
enum { count = sizeof names / sizeof *names };
void *trainerd_slots[count];
static int (*init)(unsigned);
static int status = -1; /* what cuInit gave; -1: no driver */
static char why[512];
__attribute__((constructor)) static void load(void) {
	for (int i = 0; i < count; i++) trainerd_slots[i] = (void *)missing;
	void *h = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
	if (!h) {
		const char *e = dlerror();
		snprintf(why, sizeof why, "%s", e ? e : "libcuda.so.1 does not load");
		return;
	}
	for (int i = 0; i < count; i++) {
		void *f = dlsym(h, names[i]);
		if (f) trainerd_slots[i] = f;
	}
	init = (int (*)(unsigned))dlsym(h, "cuInit");
	if (!init) snprintf(why, sizeof why, "libcuda.so.1 has no cuInit");
}
int cuInit(unsigned flags) {
	if (init) status = init(flags);
	return 0;
}
int trainerd_driver_status(char *text, int n) {
	snprintf(text, n, "%s", why);
	return status;
}
C
} >"$out/load.c"
gcc -O2 -fPIC -c -o "$out/load.o" "$out/load.c"
gcc -fPIC -c -o "$out/jumps.o" "$out/jumps.s"
# One member, so that the first function that is wanted brings them all.
ld -r -o "$out/driver.o" "$out/load.o" "$out/jumps.o"
rm -f "$out/libcuda.a"
ar rcs "$out/libcuda.a" "$out/driver.o"
