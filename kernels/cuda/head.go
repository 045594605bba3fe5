package cuda

import "trainerd/kernels"

const (
	// headBytes bounds the chunk of float32 logits that is held at once.
	headBytes = 640 << 20
	// headRows bounds it by rows: beyond this a product gets no faster.
	headRows = 4096
)

// headChunk returns how many rows of logits are held at once and the floats
// between two rows. It depends on the shape alone.
func headChunk(n, v int) (rows, ld int) {
	ld = ceil(v, 8) * 8
	most := clamp(headBytes/(4*ld), 1, headRows)
	if most > 128 {
		most = most / 128 * 128
	}
	return min(most, max(n, 1)), ld
}

// HeadScratch implements kernels.Scratcher.
func (d *Device) HeadScratch(n, dim, v int, backward bool) int64 { return logitBytes(n, v) }

// DrawScratch implements kernels.Scratcher.
func (d *Device) DrawScratch(n, dim, v int) int64 { return logitBytes(n, v) }

func logitBytes(n, v int) int64 {
	if n == 0 {
		return 0
	}
	rows, ld := headChunk(n, v)
	return kernels.Round(4*int64(rows)*int64(ld), alignment)
}

// LogProb implements kernels.Device.
func (d *Device) LogProb(h kernels.Head) { d.head("log-prob", h, nil) }

// LogProbBackward implements kernels.Device.
func (d *Device) LogProbBackward(h kernels.Head, g kernels.HeadGrad) {
	d.head("log-prob backward", h, &g)
}

const (
	clusterParts = 8
	// A row of fewer logits is in L2 when it is read again, with all that are under way.
	clusterFrom = 16384
	// clusterShared bounds the part of a row that a block keeps: V of 327,680.
	clusterShared = 160 << 10
)

// headLaunch chooses between head_rows and head_rows_cluster, which keeps a row on
// chip, by the width and the card alone: log-probs have the same bits in all modes.
func headLaunch(c driver, n, v int) (kernel string, grid, block size2, shared int) {
	shared = 4 * 8 * ceil(ceil(v, 8), clusterParts)
	if v <= clusterFrom || shared > clusterShared || !c.has("head_rows_cluster") {
		return "head_rows", size2{n, 1}, size2{1024, 1}, 0
	}
	return "head_rows_cluster", size2{n * clusterParts, 1}, size2{512, 1}, shared
}

// Modes of head_rows.
const (
	modeForward int32 = iota
	modeSurrogate
	modeGiven
)

// rowInputs are the per-row inputs of head_rows; 0 where not given.
type rowInputs struct {
	mode                                           int32
	old, ref, adv, weight, tis, dLogProb, dEntropy address
	s                                              kernels.Surrogate
}

func newRowInputs(op string, g *kernels.HeadGrad, n int) rowInputs {
	if g == nil {
		return rowInputs{mode: modeForward}
	}
	if g.Surrogate == nil {
		return rowInputs{mode: modeGiven, dLogProb: place(op, "DLogProb", g.DLogProb, n, kernels.F32), dEntropy: placeOr0(op, "DEntropy", g.DEntropy, n, kernels.F32)}
	}
	t := g.Tokens
	r := rowInputs{
		mode: modeSurrogate, s: *g.Surrogate,
		old: placeOr0(op, "Old", t.Old, n, kernels.F32), ref: placeOr0(op, "Ref", t.Ref, n, kernels.F32), adv: placeOr0(op, "Adv", t.Adv, n, kernels.F32),
		weight: place(op, "Weight", t.Weight, n, kernels.F32), tis: placeOr0(op, "TIS", t.TIS, n, kernels.F32),
	}
	must(t.Adv != nil || r.s.Kind == kernels.SurrogateNLL, op, "Adv is nil")
	must(t.Ref != nil || r.s.Beta == 0, op, "Ref is nil and Beta %v", r.s.Beta)
	return r
}

// from returns the inputs of the rows from one on.
func (r rowInputs) from(row int) rowInputs {
	for _, x := range []*address{&r.old, &r.ref, &r.adv, &r.weight, &r.tis, &r.dLogProb, &r.dEntropy} {
		*x = skip(*x, row, 4)
	}
	return r
}

// skip moves an address by n elements of a size; 0 stays 0.
func skip(at address, n, size int) address {
	if at == 0 {
		return 0
	}
	return at + address(n)*address(size)
}

// head runs chunks of rows through logits -> statistics -> logit gradients, in
// place -> gradients of Hidden and W. Forward only (g nil) and forward with
// backward share the kernel, so their log-probs agree bit for bit.
func (d *Device) head(op string, h kernels.Head, g *kernels.HeadGrad) {
	n, dim, v := h.N, h.D, h.V
	must(n >= 0 && dim > 0 && v > 0 && h.Temperature > 0, op, "N %d d %d V %d temperature %v", n, dim, v, h.Temperature)
	hidden, w := place(op, "Hidden", h.Hidden, n*dim, kernels.BF16), place(op, "W", h.W, v*dim, kernels.BF16)
	targets, logProb := place(op, "Targets", h.Targets, n, kernels.I32), place(op, "LogProb", h.LogProb, n, kernels.F32)
	entropy := placeOr0(op, "Entropy", h.Entropy, n, kernels.F32)
	in := newRowInputs(op, g, n)
	var dHidden, dW address
	var float32W bool
	if g != nil {
		dHidden = place(op, "DHidden", g.DHidden, n*dim, kernels.BF16)
		t := span(op, "DW", g.DW, kernels.F32, kernels.BF16).t
		dW, float32W = place(op, "DW", g.DW, v*dim, t), t == kernels.F32
		if n == 0 && !g.Accumulate {
			d.Zero(g.DW)
		}
	}
	if n == 0 {
		return
	}
	must(h.Scratch != nil, op, "Scratch is nil")
	mark := h.Scratch.Mark()
	defer h.Scratch.Release(mark)
	chunk, ld := headChunk(n, v)
	logits := h.Scratch.Alloc(kernels.F32, chunk*ld).(*buffer).at
	scale := 1 / h.Temperature
	for from := 0; from < n; from += chunk {
		m, r := min(chunk, n-from), in.from(from)
		x := skip(hidden, from*dim, 2)
		d.enqueue(of(op, "rows %d to %d of %d, d %d V %d", from, from+m, n, dim, v), func(c driver) error {
			z := matrices{a: x, b: w, c: logits, m: m, n: v, k: dim, transB: true, lda: dim, ldb: dim, ldc: ld, float32C: true}
			if err := d.gemm(c, z); err != nil {
				return err
			}
			kernel, grid, block, shared := headLaunch(c, m, v)
			err := c.launch(kernel, grid, block, shared, logits, int64(ld), int32(m), int32(v), skip(targets, from, 4), scale,
				skip(logProb, from, 4), skip(entropy, from, 4), r.mode, r.old, r.ref, r.adv, r.weight, r.tis, r.dLogProb, r.dEntropy,
				int32(r.s.Kind), r.s.EpsLow, r.s.EpsHigh, r.s.Delta, r.s.RatioCap, r.s.Beta, r.s.EntropyCoef, address(0), d.flag(flagTarget))
			if err != nil || g == nil {
				return err
			}
			// The gradient of the logits is bf16 in the front half of each row of logits.
			dw := matrices{a: logits, b: x, c: dW, m: v, n: dim, k: m, transA: true, lda: 2 * ld, ldb: dim, ldc: dim, float32C: float32W,
				accumulate: g.Accumulate || from > 0}
			if err := d.gemm(c, dw); err != nil {
				return err
			}
			return d.gemm(c, matrices{a: logits, b: w, c: skip(dHidden, from*dim, 2), m: m, n: dim, k: v, lda: 2 * ld, ldb: dim, ldc: dim})
		})
	}
}

// Sample implements kernels.Device.
func (d *Device) Sample(x kernels.Draw) {
	const op = "sample"
	n, dim, v := x.N, x.D, x.V
	must(n >= 0 && dim > 0 && v > 0 && x.Temperature >= 0 && x.TopP > 0 && x.TopP <= 1, op,
		"N %d d %d V %d temperature %v top-p %v", n, dim, v, x.Temperature, x.TopP)
	must(x.U != nil || x.Temperature == 0, op, "U is nil and temperature %v", x.Temperature)
	hidden, w := place(op, "Hidden", x.Hidden, n*dim, kernels.BF16), place(op, "W", x.W, v*dim, kernels.BF16)
	tokens, logProb := place(op, "Tokens", x.Tokens, n, kernels.I32), place(op, "LogProb", x.LogProb, n, kernels.F32)
	u := placeOr0(op, "U", x.U, n, kernels.F32)
	if n == 0 {
		return
	}
	must(x.Scratch != nil, op, "Scratch is nil")
	mark := x.Scratch.Mark()
	defer x.Scratch.Release(mark)
	chunk, ld := headChunk(n, v)
	logits := x.Scratch.Alloc(kernels.F32, chunk*ld).(*buffer).at
	for from := 0; from < n; from += chunk {
		m := min(chunk, n-from)
		d.enqueue(of(op, "rows %d to %d of %d, d %d V %d", from, from+m, n, dim, v), func(c driver) error {
			z := matrices{a: skip(hidden, from*dim, 2), b: w, c: logits, m: m, n: v, k: dim, transB: true, lda: dim, ldb: dim, ldc: ld, float32C: true}
			if err := d.gemm(c, z); err != nil {
				return err
			}
			return c.launch("sample_rows", size2{m, 1}, size2{1024, 1}, 0, skip(tokens, from, 4), skip(logProb, from, 4), logits, int64(ld),
				skip(u, from, 4), int32(m), int32(v), x.Temperature, x.TopP)
		})
	}
}
