// The fibers, barriers and memory of emu.h.
#include "emu.h"

#include <algorithm>
#include <cstddef>
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

enum Wait { kRuns, kBarrier, kWarp, kCluster, kDone };

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

const size_t kStack = 128 << 10, kClusterMost = 8;
unsigned char *stacks; // one mapping; pages are touched only when used
} // namespace

struct Thread {
	void *sp = nullptr;
	dim3 index;
	int id = 0;
	Wait wait = kRuns;
	unsigned generation = 0, cluster_generation = 0;
	struct Block *block = nullptr;
	int warp = 0; // of the cluster
	std::vector<Copy> copies;
	int group = 0; // cp.async group being filled
#if !defined(__x86_64__)
	ucontext_t context;
#endif
};

const size_t kDynamicMost = 256 << 10;

struct Shared { const void *key; void *at; size_t bytes; };

// Block is one of a cluster's, which run together; most clusters have one.
struct Block {
	dim3 index;
	int alive = 0, arrived = 0, barrier_line = 0;
	unsigned barrier_generation = 0;
	std::vector<Shared> shared;
	unsigned char *dynamic_end = nullptr, *dynamic = nullptr;
};

namespace {
std::vector<Thread> threads; // of a cluster
std::vector<Warp> warps;
std::vector<Block> blocks;
Thread *current;
const std::function<void()> *body;
int alive, cluster_arrived;
unsigned cluster_generation;

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

void release_barrier(Block &b) {
	if (b.alive > 0 && b.arrived == b.alive) {
		b.arrived = 0;
		b.barrier_generation++;
	}
}

void entry() {
	(*body)();
	current->wait = kDone;
	alive--;
	current->block->alive--;
	warps[current->warp].lanes--;
	release_barrier(*current->block);
	to_scheduler();
	abort();
}

void prepare(Thread &t) {
	unsigned char *top = stacks + (&t - threads.data() + 1) * kStack;
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
	case kBarrier: return t.generation != t.block->barrier_generation;
	case kWarp: return t.generation != warps[t.warp].generation;
	case kCluster: return t.cluster_generation != cluster_generation;
	default: return false;
	}
}

// run_cluster runs the blocks from index first on.
void run_cluster(size_t first, std::mt19937 &rng, std::vector<int> &turn) {
	int all = int(threads.size()), n = all / int(blocks.size());
	alive = all, cluster_arrived = 0;
	for (auto &w : warps) w.arrived = w.lanes = 0;
	for (size_t i = 0; i < blocks.size(); i++) {
		Block &b = blocks[i];
		b.index = {unsigned((first + i) % grid_dim.x), unsigned((first + i) / grid_dim.x), 0};
		b.alive = n, b.arrived = 0;
		for (auto &s : b.shared) memset(s.at, 0xff, s.bytes);
		memset(b.dynamic, 0xff, size_t(b.dynamic_end - b.dynamic));
	}
	for (int i = 0; i < all; i++) {
		Thread &t = threads[i];
		t.id = i % n, t.wait = kRuns, t.group = 0, t.block = &blocks[i / n], t.warp = i / n * ((n + 31) / 32) + t.id / 32;
		t.copies.clear();
		t.index = {t.id % block_dim.x, t.id / block_dim.x % block_dim.y, t.id / block_dim.x / block_dim.y};
		warps[t.warp].lanes++;
		prepare(t);
	}
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
			block_idx = t.block->index;
#if defined(__x86_64__)
			emu_switch(&scheduler_sp, t.sp);
#else
			swapcontext(&scheduler, &t.context);
#endif
		}
		if (!progress) die("deadlock: threads wait at different barriers or some left", alive, current->block->arrived);
	}
}
} // namespace

void launch(dim3 grid, dim3 block, size_t smem, const std::function<void()> &kernel, unsigned cluster) {
	if (!stacks) stacks = static_cast<unsigned char *>(mmap(nullptr, kClusterMost * 1024 * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
	size_t n = size_t(block.x) * block.y * block.z;
	if (n == 0 || n > 1024 || smem > 227 << 10 || grid.x == 0 || grid.y == 0 || grid.y > 65535 || cluster == 0 || cluster > kClusterMost || grid.x % cluster) {
		fprintf(stderr, "emu: bad launch: grid (%u,%u) block (%u,%u) smem %zu clusters of %u\n", grid.x, grid.y, block.x, block.y, smem, cluster);
		abort();
	}
	for (auto &b : blocks)
		for (auto &s : b.shared) free(s.at);
	static std::vector<unsigned char *> ends;
	while (ends.size() < cluster) {
		unsigned char *m = static_cast<unsigned char *>(mmap(nullptr, kDynamicMost + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
		mprotect(m + kDynamicMost, 4096, PROT_NONE);
		ends.push_back(m + kDynamicMost);
	}
	blocks.assign(cluster, Block());
	for (unsigned i = 0; i < cluster; i++) blocks[i].dynamic_end = ends[i], blocks[i].dynamic = ends[i] - (smem + 15) / 16 * 16;
	threads.resize(n * cluster);
	warps.resize((n + 31) / 32 * cluster);
	block_dim = block, grid_dim = grid, body = &kernel;
	std::mt19937 rng(7);
	std::vector<int> turn(n * cluster);
	for (size_t i = 0; i < turn.size(); i++) turn[i] = int(order == kReverse ? turn.size() - 1 - i : i);
	size_t clusters = size_t(grid.x) * grid.y / cluster;
	for (size_t i = 0; i < clusters; i++) run_cluster((order == kReverse ? clusters - 1 - i : i) * cluster, rng, turn);
}

void barrier(const char *, int line) {
	Thread *t = current;
	Block &b = *t->block;
	if (b.arrived == 0) b.barrier_line = line;
	if (b.barrier_line != line) die("barrier reached at different lines", b.barrier_line, line);
	t->generation = b.barrier_generation;
	t->wait = kBarrier;
	b.arrived++;
	release_barrier(b);
	to_scheduler();
}

void cluster_arrive() {
	current->cluster_generation = cluster_generation;
	if (++cluster_arrived == int(threads.size())) cluster_arrived = 0, cluster_generation++;
}

void cluster_wait() {
	if (current->cluster_generation != cluster_generation) return;
	current->wait = kCluster;
	to_scheduler();
}

int cluster_rank() { return int(current->block - blocks.data()); }

const void *cluster_shared(const void *mine, int rank) {
	for (auto &s : current->block->shared) {
		std::ptrdiff_t at = static_cast<const unsigned char *>(mine) - static_cast<unsigned char *>(s.at);
		if (at < 0 || size_t(at) >= s.bytes) continue;
		for (auto &o : blocks[rank].shared)
			if (o.key == s.key) return static_cast<unsigned char *>(o.at) + at;
	}
	die("no such shared memory in another block of the cluster", rank, 0);
}

const unsigned char *exchange(const void *mine, size_t bytes, int line) {
	Thread *t = current;
	Warp &w = warps[t->warp];
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
	auto &shared = current->block->shared;
	for (auto &s : shared)
		if (s.key == key) return s.at;
	void *at = aligned_alloc(16, (bytes + 15) / 16 * 16);
	memset(at, 0xff, bytes);
	shared.push_back({key, at, bytes});
	return at;
}

void *dynamic_shared() { return current->block->dynamic; }

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
