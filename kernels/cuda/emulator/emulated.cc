// The emulated card as a shared library: every kernel by name, with its parameters
// in the packed block that a real launch takes. calls.inc, which build.sh writes, lists the kernels.
#include "../emu/emu.h"
#include "../emu/kernels.h"

#include <tuple>
#include <type_traits>

// Says whether a pointer that is no null may be given to a kernel; not set: any may.
extern "C" bool (*emulated_valid)(const void *);
bool (*emulated_valid)(const void *);

namespace {

template <class T>
bool valid(T x) {
	if constexpr (std::is_pointer<T>::value) return !x || !emulated_valid || emulated_valid(x);
	return true;
}

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

// 0, 2 when the block is not of the size that the kernel's parameters have, or 3 for an invalid pointer.
template <class... A>
int call(const char *name, void (*kernel)(A...), emu::dim3 grid, emu::dim3 block, size_t shared, Block b) {
	std::tuple<A...> args{b.take<A>()...}; // braces: in order
	if (!b.whole || b.at != b.size) return 2;
	if (!std::apply([](auto... x) { return (valid(x) && ...); }, args)) return 3;
	emu::launch(grid, block, shared, [&] { std::apply(kernel, args); }, cluster_blocks(name));
	return 0;
}

} // namespace

extern "C" int emulated_has(const char *name) {
#define KERNEL(k) \
	if (!strcmp(name, #k)) return 1;
#include "calls.inc"
#undef KERNEL
	return 0;
}

// Returns 0, 1 for an unknown kernel, 2 for parameters of another size, 3 for a pointer that is not valid.
extern "C" int emulated_launch(const char *name, unsigned gx, unsigned gy, unsigned bx, unsigned by, unsigned shared, const void *args, size_t size) {
	emu::dim3 grid, block;
	grid.x = gx, grid.y = gy, block.x = bx, block.y = by;
	Block b{static_cast<const unsigned char *>(args), size};
#define KERNEL(k) \
	if (!strcmp(name, #k)) return call(name, k, grid, block, shared, b);
#include "calls.inc"
	return 1;
}
