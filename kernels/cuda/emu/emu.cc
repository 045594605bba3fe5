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

enum Wait { kRuns, kBarrier, kWarp, kGroup, kCluster, kDone };

struct Copy {
	void *dst;
	const void *src;
	int bytes;
	bool valid;
	int group;
};

// Product is one wgmma64 of a thread, to be done when its warpgroup waits.
struct Product {
	float (*c)[4];
	float before[8][4]; // of the first product into c
	bool first, trans, add;
	unsigned a[4];
	unsigned long long b;
};

struct Range {
	unsigned char *at;
	int bytes;
};

// Group is a warpgroup: four warps from a multiple of four on.
struct Group {
	int arrived = 0, line = 0;
	unsigned generation = 0;
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
	std::vector<Range> landed, fenced; // copied since the last barrier, and fenced
	std::vector<Product> products;
	bool begun = false; // since the last wait
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
	std::vector<unsigned char> seen; // the dynamic memory as products see it
};

namespace {
std::vector<Thread> threads; // of a cluster
std::vector<Warp> warps;
std::vector<Group> groups; // of four warps
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
		for (auto &t : threads) {
			if (t.block != &b) continue;
			for (auto &r : t.fenced) memcpy(b.seen.data() + (r.at - b.dynamic), r.at, r.bytes);
			t.fenced.clear();
			t.landed.clear(); // the fence belongs between the wait and the barrier
		}
	}
}

void entry() {
	(*body)();
	if (!current->products.empty()) die("a thread ends before its products", int(current->products.size()), 0);
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
	case kGroup: return t.generation != groups[t.warp / 4].generation;
	case kCluster: return t.cluster_generation != cluster_generation;
	default: return false;
	}
}

// run_cluster runs the blocks from index first on.
void run_cluster(size_t first, std::mt19937 &rng, std::vector<int> &turn) {
	int all = int(threads.size()), n = all / int(blocks.size());
	alive = all, cluster_arrived = 0;
	for (auto &w : warps) w.arrived = w.lanes = 0;
	for (auto &g : groups) g.arrived = 0;
	for (size_t i = 0; i < blocks.size(); i++) {
		Block &b = blocks[i];
		b.index = {unsigned((first + i) % grid_dim.x), unsigned((first + i) / grid_dim.x), 0};
		b.alive = n, b.arrived = 0;
		for (auto &s : b.shared) memset(s.at, 0xff, s.bytes);
		memset(b.dynamic, 0xff, size_t(b.dynamic_end - b.dynamic));
		b.seen.assign(size_t(b.dynamic_end - b.dynamic), 0xff);
	}
	for (int i = 0; i < all; i++) {
		Thread &t = threads[i];
		t.id = i % n, t.wait = kRuns, t.group = 0, t.block = &blocks[i / n], t.warp = i / n * ((n + 31) / 32) + t.id / 32;
		t.copies.clear(), t.landed.clear(), t.fenced.clear(), t.products.clear(), t.begun = false;
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
	groups.resize((warps.size() + 3) / 4);
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
	Block &b = *current->block;
	unsigned char *at = static_cast<unsigned char *>(dst);
	if (at >= b.dynamic && at < b.dynamic_end) memset(b.seen.data() + (at - b.dynamic), 0xff, bytes);
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
			unsigned char *at = static_cast<unsigned char *>(x.dst);
			if (at >= current->block->dynamic && at < current->block->dynamic_end) current->landed.push_back({at, x.bytes});
		} else {
			c[kept++] = x;
		}
	}
	c.resize(kept);
}

// What products see of a block's dynamic memory is a second copy of it, which takes what a
// cp.async wrote once its thread waited, fenced, and a barrier followed. They are done
// when the last thread of a warpgroup waits, in order; until then the accumulators are NaN.

unsigned shared_address(const void *p) {
	const Block &b = *current->block;
	const unsigned char *at = static_cast<const unsigned char *>(p);
	if (at < b.dynamic || at > b.dynamic_end) die("the shared address of something else", 0, 0);
	return unsigned(at - (b.dynamic_end - kDynamicMost));
}

void fence_async() {
	Thread &t = *current;
	t.fenced.insert(t.fenced.end(), t.landed.begin(), t.landed.end());
	t.landed.clear();
}

void products_begin() {
	if (!current->products.empty()) die("wgmma.fence between products and their wait", 0, 0);
	current->begun = true;
}

void product(float (*c)[4], const unsigned (&a)[4], unsigned long long b, bool trans, bool add) {
	Thread &t = *current;
	if (!t.begun) die("wgmma without wgmma.fence", 0, 0);
	const unsigned long long tile = 64ull << 32 | 1ull << 62; // stride offset and swizzle
	if ((b & ~(0x3fffull | 0x3fffull << 16)) != tile) die("wgmma with a descriptor of another layout", int(b >> 32), int(b));
	Product p = {c, {}, true, trans, add, {a[0], a[1], a[2], a[3]}, b};
	for (auto &q : t.products)
		if (q.c == c) p.first = false;
	if (p.first) {
		memcpy(p.before, c, sizeof p.before);
		memset(c, 0xff, sizeof p.before);
	}
	t.products.push_back(p);
}

namespace {
// operand gives B[k][n] of a product as a card reads it: from an address whose bits 4-6 are
// exchanged with their exclusive or with bits 7-9.
float operand(const Block &block, const Product &p, int k, int n) {
	int row = p.trans ? k : n, column = p.trans ? n : k;
	size_t at = size_t(p.b & 0x3fff) * 16 + size_t(row / 8) * size_t(p.b >> 32 & 0x3fff) * 16 + size_t(row % 8) * 128 + size_t(column) * 2;
	at ^= (at >> 7 & 7) << 4;
	size_t first = kDynamicMost - block.seen.size();
	if (at < first || at + 2 > kDynamicMost) die("wgmma reads outside of shared memory", int(at), int(first));
	unsigned short x;
	memcpy(&x, block.seen.data() + (at - first), 2);
	return bf(x);
}

void multiply(Thread *four) { // 128 threads
	for (size_t i = 0; i < four->products.size(); i++) {
		const Product &same = four->products[i];
		float b[64][16];
		for (int n = 0; n < 64; n++)
			for (int k = 0; k < 16; k++) b[n][k] = operand(*four->block, same, k, n);
		for (int warp = 0; warp < 4; warp++) {
			Thread *lanes = four + 32 * warp;
			float a[16][16];
			for (int row = 0; row < 16; row++)
				for (int k = 0; k < 16; k++) a[row][k] = bf(static_cast<unsigned short>(lanes[row % 8 * 4 + k % 8 / 2].products[i].a[k / 8 * 2 + row / 8] >> k % 2 * 16));
			for (int l = 0; l < 32; l++) {
				const Product &p = lanes[l].products[i];
				if (p.first) memcpy(p.c, p.before, sizeof p.before);
				for (int n = 0; n < 8; n++)
					for (int x = 0; x < 4; x++) p.c[n][x] = mma_sum(p.add ? p.c[n][x] : 0, a[l / 4 + x / 2 * 8], b[8 * n + l % 4 * 2 + x % 2]);
			}
		}
	}
}
} // namespace

void products_end(int line) {
	Thread &t = *current;
	if (t.products.empty()) die("wgmma.wait_group without products", line, 0);
	Group &g = groups[t.warp / 4];
	if (g.arrived == 0) g.line = line;
	if (g.line != line) die("warps of a warpgroup wait for products at different lines", g.line, line);
	t.generation = g.generation;
	t.wait = kGroup;
	if (++g.arrived == 128) {
		Thread *four = &threads[size_t(t.warp) / 4 * 128];
		for (int i = 1; i < 128; i++) {
			bool same = four[i].block == four->block && four[i].products.size() == four->products.size();
			for (size_t j = 0; same && j < four->products.size(); j++) {
				const Product &p = four->products[j], &q = four[i].products[j];
				same = p.b == q.b && p.trans == q.trans && p.add == q.add && p.first == q.first;
			}
			if (!same) die("threads of a warpgroup have different products", i, line);
		}
		multiply(four);
		for (int i = 0; i < 128; i++) four[i].products.clear(), four[i].begun = false;
		g.arrived = 0;
		g.generation++;
	}
	to_scheduler();
}
} // namespace emu
