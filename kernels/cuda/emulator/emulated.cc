// The emulated card as a shared library: every kernel by name, with its parameters
// in the packed block that a real launch takes. calls.inc, which build.sh writes, lists the kernels.
#include "../emu/emu.h"
#include "../emu/kernels.h"

#include <tuple>

namespace {

struct Block {
	const unsigned char *args;
	size_t size, at = 0;
	bool whole = true;

	template <class T>
	T take() {
		at = (at + sizeof(T) - 1) / sizeof(T) * sizeof(T);
		T x{};
		if (at + sizeof(T) > size) whole = false;
		else memcpy(&x, args + at, sizeof(T));
		at += sizeof(T);
		return x;
	}
};

// 0, or 2 when the block is not of the size that the kernel's parameters have.
template <class... A>
int call(void (*kernel)(A...), emu::dim3 grid, emu::dim3 block, size_t shared, Block b) {
	std::tuple<A...> args{b.take<A>()...}; // braces: in order
	if (!b.whole || b.at != b.size) return 2;
	emu::launch(grid, block, shared, [&] { std::apply(kernel, args); });
	return 0;
}

} // namespace

// Returns 0, 1 for an unknown kernel, 2 for parameters of another size.
extern "C" int emulated_launch(const char *name, unsigned gx, unsigned gy, unsigned bx, unsigned by, unsigned shared, const void *args, size_t size) {
	emu::dim3 grid, block;
	grid.x = gx, grid.y = gy, block.x = bx, block.y = by;
	Block b{static_cast<const unsigned char *>(args), size};
#define KERNEL(k) \
	if (!strcmp(name, #k)) return call(k, grid, block, shared, b);
#include "calls.inc"
	return 1;
}
