package kernels

import (
	"fmt"
	"sort"

	"gorgonia.org/tensor"

	"trainerd/kernels/internal/seal"
)

// Plan is the exact number of bytes a run of device calls allocates, by purpose.
type Plan struct {
	Bytes map[string]int64 `json:"bytes"` // "weights", "gradients", "optimizer", "scratch", ...
	Total int64            `json:"total"`
	Free  int64            `json:"free"` // what the device had when the plan was made
	Host  int64            `json:"host"` // page-locked host memory beside it, see HostAllocator
}

// Fits reports whether the planned bytes are free on the device.
func (p Plan) Fits() bool { return p.Total <= p.Free }

// String lists the purposes, largest first.
func (p Plan) String() string {
	names := make([]string, 0, len(p.Bytes))
	for n := range p.Bytes {
		names = append(names, n)
	}
	sort.Slice(names, func(i, j int) bool {
		a, b := names[i], names[j]
		if p.Bytes[a] != p.Bytes[b] {
			return p.Bytes[a] > p.Bytes[b]
		}
		return a < b
	})
	s := fmt.Sprintf("%d bytes of %d free:", p.Total, p.Free)
	for _, n := range names {
		s += fmt.Sprintf(" %s %d", n, p.Bytes[n])
	}
	if p.Host > 0 {
		s += fmt.Sprintf("; and %d of host memory", p.Host)
	}
	return s
}

// OutOfArena is what Arena.Alloc panics with.
type OutOfArena struct{ Want, Height, Capacity int64 }

func (e *OutOfArena) Error() string {
	return fmt.Sprintf("arena of %d bytes is full: %d in use, %d more wanted", e.Capacity, e.Height, e.Want)
}

// Scratcher is what a device tells a Planner about the scratch memory that its
// operations take from an arena beyond what the caller allocates.
type Scratcher interface {
	AttentionScratch(t, h, kv, hd int, backward bool) int64
	HeadScratch(n, d, v int, backward bool) int64
	DrawScratch(n, d, v int) int64
	LayoutScratch(segments, t int) int64
}

// NewPlanner returns a planner with the shape of dev. When dev implements
// Scratcher, its operations' own scratch is counted too.
func NewPlanner(dev Device) Planner {
	s, _ := dev.(Scratcher)
	p := &PlanDevice{info: dev.Info(), bytes: map[string]int64{}, scratch: s}
	if _, ok := dev.(HostAllocator); ok {
		return &hostPlanDevice{p}
	}
	return p
}

// Planner is a device that computes nothing and counts bytes. It is a
// HostAllocator if the device it plans for is one.
type Planner interface {
	Device
	Plan() Plan
}

// hostPlanDevice plans for a HostAllocator.
type hostPlanDevice struct{ *PlanDevice }

func (p *hostPlanDevice) AllocHost(purpose string, t DType, n int) (Buffer, error) {
	b := &planBuffer{t: t, n: n, purpose: purpose, host: true}
	p.host += p.size(b)
	return b, nil
}

// PlanDevice is a device that computes nothing and counts bytes. Running a model's
// real code on it gives the memory plan before anything is allocated.
type PlanDevice struct {
	seal.Mark
	info    Info
	bytes   map[string]int64
	host    int64
	scratch Scratcher
}

// size is what a buffer takes of its memory.
func (p *PlanDevice) size(b *planBuffer) int64 {
	return Round(int64(b.n)*int64(b.t.Size()), int64(p.info.Alignment))
}

// Plan returns what has been allocated so far. Scratch counts each arena's peak.
func (p *PlanDevice) Plan() Plan {
	out := Plan{Bytes: map[string]int64{}, Free: p.info.MemFree, Host: p.host}
	for k, v := range p.bytes {
		if v != 0 {
			out.Bytes[k] = v
			out.Total += v
		}
	}
	return out
}

type planBuffer struct {
	seal.Mark
	t       DType
	n       int
	purpose string
	host    bool
}

func (b *planBuffer) Type() DType { return b.t }
func (b *planBuffer) Len() int    { return b.n }
func (b *planBuffer) Slice(from, to int) Buffer {
	if from < 0 || to < from || to > b.n {
		panic(fmt.Sprintf("slice [%d,%d) of a buffer of %d", from, to, b.n))
	}
	return &planBuffer{t: b.t, n: to - from}
}

// PlanArena counts the height of a stack that has no capacity.
type PlanArena struct {
	align, height, peak int64
}

// Round returns n bytes rounded up to a multiple of align.
func Round(n, align int64) int64 {
	if align <= 1 {
		return n
	}
	return (n + align - 1) / align * align
}

func (a *PlanArena) Alloc(t DType, n int) Buffer {
	a.reserve(int64(n) * int64(t.Size()))
	return &planBuffer{t: t, n: n}
}

func (a *PlanArena) reserve(bytes int64) {
	a.height += Round(bytes, a.align)
	a.peak = max(a.peak, a.height)
}

// touch counts bytes that an operation takes and gives back.
func (a *PlanArena) touch(bytes int64) {
	m := a.Mark()
	a.reserve(bytes)
	a.Release(m)
}

func (a *PlanArena) Mark() int64        { return a.height }
func (a *PlanArena) Release(mark int64) { a.height = mark }
func (a *PlanArena) Peak() int64        { return a.peak }

func (p *PlanDevice) Info() Info { return p.info }

func (p *PlanDevice) Alloc(purpose string, t DType, n int) (Buffer, error) {
	b := &planBuffer{t: t, n: n, purpose: purpose}
	p.bytes[purpose] += p.size(b)
	return b, nil
}

func (p *PlanDevice) Free(b Buffer) {
	pb := b.(*planBuffer)
	if pb.host {
		p.host -= p.size(pb)
		return
	}
	p.bytes[pb.purpose] -= p.size(pb)
}

// NewArena counts the capacity under "scratch"; give 0 to measure with the
// returned arena's Peak instead.
func (p *PlanDevice) NewArena(capacity int64) (Arena, error) {
	p.bytes["scratch"] += capacity
	return &PlanArena{align: int64(p.info.Alignment)}, nil
}

func (p *PlanDevice) FreeArena(Arena) {}

type planLayout struct {
	seal.Mark
	segments []Segment
}

func (l planLayout) Segments() []Segment { return l.segments }

func (p *PlanDevice) Layout(a Arena, segments []Segment) Layout {
	if p.scratch != nil {
		t := 0
		for _, s := range segments {
			t += int(s.QLen)
		}
		a.(*PlanArena).reserve(p.scratch.LayoutScratch(len(segments), t))
	}
	return planLayout{segments: segments}
}

func (p *PlanDevice) Scatter(a Arena, s ScatterIndex) Scatter {
	a.Alloc(I32, len(s.Dst))
	a.Alloc(I32, len(s.Start))
	a.Alloc(I32, len(s.Src))
	return planLayout{}
}

func (p *PlanDevice) touch(a Arena, bytes func(Scratcher) int64) {
	if p.scratch != nil && a != nil {
		a.(*PlanArena).touch(bytes(p.scratch))
	}
}

func (p *PlanDevice) Attention(x Attention) {
	p.touch(x.Scratch, func(s Scratcher) int64 { return s.AttentionScratch(x.T, x.H, x.KV, x.HD, false) })
}

func (p *PlanDevice) AttentionBackward(x AttentionBackward) {
	p.touch(x.Scratch, func(s Scratcher) int64 { return s.AttentionScratch(x.T, x.H, x.KV, x.HD, true) })
}

func (p *PlanDevice) LogProb(x Head) {
	p.touch(x.Scratch, func(s Scratcher) int64 { return s.HeadScratch(x.N, x.D, x.V, false) })
}

func (p *PlanDevice) LogProbBackward(x Head, _ HeadGrad) {
	p.touch(x.Scratch, func(s Scratcher) int64 { return s.HeadScratch(x.N, x.D, x.V, true) })
}

func (p *PlanDevice) Sample(x Draw) {
	p.touch(x.Scratch, func(s Scratcher) int64 { return s.DrawScratch(x.N, x.D, x.V) })
}

func (p *PlanDevice) Upload(Buffer, *tensor.Dense)                         {}
func (p *PlanDevice) Download(*tensor.Dense, Buffer) error                 { return nil }
func (p *PlanDevice) Sync() error                                          { return nil }
func (p *PlanDevice) Close() error                                         { return nil }
func (p *PlanDevice) Zero(Buffer)                                          {}
func (p *PlanDevice) Copy(dst, src Buffer)                                 {}
func (p *PlanDevice) Lerp(dst, src Buffer, alpha float32)                  {}
func (p *PlanDevice) Gather(out, table, rows Buffer, d int)                {}
func (p *PlanDevice) ScatterAdd(dst, src Buffer, s Scatter, d int, a bool) {}
func (p *PlanDevice) Gemm(Gemm)                                            {}
func (p *PlanDevice) BiasBackward(db, dy Buffer, m, n int, acc bool)       {}
func (p *PlanDevice) RMSNorm(Norm)                                         {}
func (p *PlanDevice) RMSNormBackward(NormBackward)                         {}
func (p *PlanDevice) Rope(Rope)                                            {}
func (p *PlanDevice) RopeBackward(RopeBackward)                            {}
func (p *PlanDevice) SwiGLU(out, gu Buffer, t, f int)                      {}
func (p *PlanDevice) SwiGLUBackward(dgu, dout, gu Buffer, t, f int)        {}
func (p *PlanDevice) Advantages(Advantages)                                {}
func (p *PlanDevice) SumSquares(out, x Buffer)                             {}
func (p *PlanDevice) ClipCoef(coef, sumsq Buffer, scale, maxNorm float32)  {}
func (p *PlanDevice) AdamW(AdamW)                                          {}
func (p *PlanDevice) AddGrad(AddGrad)                                      {}

var _ Device = (*PlanDevice)(nil)
