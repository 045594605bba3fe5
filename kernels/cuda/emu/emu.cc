// The fibers, barriers and memory of emu.h.
#include "emu.h"

#include <algorithm>
#include <random>
#include <sys/mman.h>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

dim3 thread_idx, block_idx, block_dim, grid_dim;
Order order = kForward;

namespace {

enum Wait { kRuns, kBarrier, kWarp, kDone };

struct Copy {
	void *dst;
	const void *src;
	int bytes;
	bool valid;
	int group;
};

struct Warp {
	int arrived = 0, lanes = 0, line = 0;
	unsigned generation = 0;
	unsigned char in[32 * 64], out[32 * 64];
};

[[noreturn]] void die(const char *what, int a, int b) {
	fprintf(stderr, "emu: block (%u,%u) thread (%u,%u): %s (%d, %d)\n", block_idx.x, block_idx.y, thread_idx.x, thread_idx.y, what, a, b);
	abort();
}

const size_t kStack = 128 << 10;
unsigned char *stacks; // one mapping; pages are touched only when used
} // namespace

struct Thread {
	void *sp = nullptr;
	dim3 index;
	int id = 0;
	Wait wait = kRuns;
	unsigned generation = 0;
	std::vector<Copy> copies;
	int group = 0; // cp.async group being filled
#if !defined(__x86_64__)
	ucontext_t context;
#endif
};

namespace {
std::vector<Thread> threads;
std::vector<Warp> warps;
Thread *current;
const std::function<void()> *body;
int arrived, alive, barrier_line;
unsigned barrier_generation;
struct Shared { const void *key; void *at; size_t bytes; };
std::vector<Shared> shared;
unsigned char *dynamic_end, *dynamic;

#if defined(__x86_64__)
void *scheduler_sp;
// Saves the callee-saved registers and the stack pointer, and takes another's.
extern "C" void emu_switch(void **from, void *to);
__asm__(R"(
.text
.type emu_switch,@function
emu_switch:
	push %rbp
	push %rbx
	push %r12
	push %r13
	push %r14
	push %r15
	mov %rsp, (%rdi)
	mov %rsi, %rsp
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbx
	pop %rbp
	ret
)");
#else
ucontext_t scheduler;
#endif

void to_scheduler() {
#if defined(__x86_64__)
	emu_switch(&current->sp, scheduler_sp);
#else
	swapcontext(&current->context, &scheduler);
#endif
}

void release_barrier() {
	if (alive > 0 && arrived == alive) {
		arrived = 0;
		barrier_generation++;
	}
}

void entry() {
	(*body)();
	current->wait = kDone;
	alive--;
	warps[current->id / 32].lanes--;
	release_barrier();
	to_scheduler();
	abort();
}

void prepare(Thread &t) {
	unsigned char *top = stacks + (t.id + 1) * kStack;
#if defined(__x86_64__)
	void **sp = reinterpret_cast<void **>(top) - 1; // entry sees rsp = 8 mod 16
	*--sp = reinterpret_cast<void *>(entry);
	for (int i = 0; i < 6; i++) *--sp = nullptr;
	t.sp = sp;
#else
	getcontext(&t.context);
	t.context.uc_stack.ss_sp = top - kStack;
	t.context.uc_stack.ss_size = kStack;
	t.context.uc_link = nullptr;
	makecontext(&t.context, entry, 0);
#endif
}

bool ready(const Thread &t) {
	switch (t.wait) {
	case kRuns: return true;
	case kBarrier: return t.generation != barrier_generation;
	case kWarp: return t.generation != warps[t.id / 32].generation;
	default: return false;
	}
}

void run_block(std::mt19937 &rng, std::vector<int> &turn) {
	int n = int(threads.size());
	alive = n, arrived = 0;
	for (auto &w : warps) w.arrived = w.lanes = 0;
	for (int i = 0; i < n; i++) {
		Thread &t = threads[i];
		t.id = i, t.wait = kRuns, t.group = 0;
		t.copies.clear();
		t.index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
		warps[i / 32].lanes++;
		prepare(t);
	}
	for (auto &s : shared) memset(s.at, 0xff, s.bytes);
	memset(dynamic, 0xff, size_t(dynamic_end - dynamic));
	while (alive > 0) {
		bool progress = false;
		if (order == kShuffled) std::shuffle(turn.begin(), turn.end(), rng);
		for (int i : turn) {
			Thread &t = threads[i];
			if (!ready(t)) continue;
			progress = true;
			t.wait = kRuns;
			current = &t;
			thread_idx = t.index;
#if defined(__x86_64__)
			emu_switch(&scheduler_sp, t.sp);
#else
			swapcontext(&scheduler, &t.context);
#endif
		}
		if (!progress) die("deadlock: threads wait at different barriers or some left", alive, arrived);
	}
}
} // namespace

void launch(dim3 grid, dim3 block, size_t smem, const std::function<void()> &kernel) {
	const size_t most = 256 << 10;
	if (!stacks) {
		stacks = static_cast<unsigned char *>(mmap(nullptr, 1024 * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
		unsigned char *m = static_cast<unsigned char *>(mmap(nullptr, most + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
		mprotect(m + most, 4096, PROT_NONE);
		dynamic_end = m + most;
	}
	size_t n = size_t(block.x) * block.y * block.z;
	if (n == 0 || n > 1024 || smem > 227 << 10 || grid.x == 0 || grid.y == 0 || grid.y > 65535) {
		fprintf(stderr, "emu: bad launch: grid (%u,%u) block (%u,%u) smem %zu\n", grid.x, grid.y, block.x, block.y, smem);
		abort();
	}
	dynamic = dynamic_end - (smem + 15) / 16 * 16;
	threads.resize(n);
	warps.resize((n + 31) / 32);
	for (auto &s : shared) free(s.at);
	shared.clear();
	block_dim = block, grid_dim = grid, body = &kernel;
	std::mt19937 rng(7);
	std::vector<int> turn(n);
	for (size_t i = 0; i < n; i++) turn[i] = int(order == kReverse ? n - 1 - i : i);
	size_t blocks = size_t(grid.x) * grid.y;
	for (size_t i = 0; i < blocks; i++) {
		size_t b = order == kReverse ? blocks - 1 - i : i;
		block_idx = {unsigned(b % grid.x), unsigned(b / grid.x), 0};
		run_block(rng, turn);
	}
}

void barrier(const char *, int line) {
	Thread *t = current;
	if (arrived == 0) barrier_line = line;
	if (barrier_line != line) die("barrier reached at different lines", barrier_line, line);
	t->generation = barrier_generation;
	t->wait = kBarrier;
	arrived++;
	release_barrier();
	to_scheduler();
}

const unsigned char *exchange(const void *mine, size_t bytes, int line) {
	Thread *t = current;
	Warp &w = warps[t->id / 32];
	if (bytes > 64) die("exchange of too many bytes", int(bytes), line);
	if (w.lanes != 32) die("warp operation in an incomplete warp", w.lanes, line);
	if (w.arrived == 0) w.line = line;
	if (w.line != line) die("warp operation reached at different lines", w.line, line);
	memcpy(w.in + 64 * (t->id % 32), mine, bytes);
	t->generation = w.generation;
	if (++w.arrived == 32) {
		memcpy(w.out, w.in, sizeof w.in);
		w.arrived = 0;
		w.generation++;
	} else {
		t->wait = kWarp;
		to_scheduler();
	}
	return w.out;
}

int lane() { return current->id % 32; }

void *block_shared(const void *key, size_t bytes) {
	for (auto &s : shared)
		if (s.key == key) return s.at;
	void *at = aligned_alloc(16, (bytes + 15) / 16 * 16);
	memset(at, 0xff, bytes);
	shared.push_back({key, at, bytes});
	return at;
}

void *dynamic_shared() { return dynamic; }

void copy_async(void *dst, const void *src, int bytes, bool valid) {
	if ((uintptr_t(dst) | uintptr_t(src)) & (bytes - 1)) die("cp.async of an unaligned address", int(uintptr_t(dst) & 15), int(uintptr_t(src) & 15));
	memset(dst, 0xff, bytes);
	current->copies.push_back({dst, src, bytes, valid, current->group});
}

void copy_commit() { current->group++; }

void copy_wait(int pending) {
	auto &c = current->copies;
	size_t kept = 0;
	for (auto &x : c) {
		if (x.group < current->group - pending) {
			if (x.valid) memcpy(x.dst, x.src, x.bytes);
			else memset(x.dst, 0, x.bytes);
		} else {
			c[kept++] = x;
		}
	}
	c.resize(kept);
}
} // namespace emu
