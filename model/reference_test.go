package model_test

import (
	"fmt"
	"math"
	"testing"

	"gorgonia.org/tensor"

	"trainerd/model"
)

// refModel is an independent decoder in float64: plain loops over Hugging Face
// tensors, nothing fused, one whole sequence at a time.
type refModel struct {
	cfg model.Config
	w   map[string][]float64
}

func newRefModel(t *testing.T, src model.Source) *refModel {
	t.Helper()
	r := &refModel{cfg: src.Config(), w: map[string][]float64{}}
	for _, name := range src.Names() {
		values := readTensor(t, src, name)
		r.w[name] = make([]float64, len(values))
		for i, v := range values {
			r.w[name][i] = float64(v)
		}
	}
	return r
}

func readTensor(t testing.TB, src model.Source, name string) []float32 {
	t.Helper()
	shape, ok := src.Shape(name)
	if !ok {
		t.Fatalf("no tensor %s", name)
	}
	dst := tensor.New(tensor.WithShape(shape...), tensor.Of(tensor.Float32))
	if err := src.Read(name, dst); err != nil {
		t.Fatal(err)
	}
	return dst.Float32s()
}

// matvec is y = W x + b with W [n,k].
func matvec(w, x, b []float64) []float64 {
	n := len(w) / len(x)
	y := make([]float64, n)
	for i := range y {
		if b != nil {
			y[i] = b[i]
		}
		for j, v := range x {
			y[i] += w[i*len(x)+j] * v
		}
	}
	return y
}

func (r *refModel) norm(x, w []float64) []float64 {
	ss := 0.0
	for _, v := range x {
		ss += v * v
	}
	s := 1 / math.Sqrt(ss/float64(len(x))+r.cfg.NormEps)
	y := make([]float64, len(x))
	for i := range x {
		y[i] = x[i] * s * w[i]
	}
	return y
}

func (r *refModel) rope(x []float64, pos int) {
	half := len(x) / 2
	for i := range half {
		a := float64(pos) * math.Pow(r.cfg.RopeTheta, -2*float64(i)/float64(len(x)))
		sin, cos := math.Sincos(a)
		u, v := x[i], x[i+half]
		x[i], x[i+half] = u*cos-v*sin, v*cos+u*sin
	}
}

// logProbs returns, for each token after the first `from`, its log-prob and the
// entropy of its distribution given all tokens before it.
func (r *refModel) logProbs(tokens []int32, from int, temperature float64) (lp, ent []float64) {
	c := r.cfg
	d, hd := c.Hidden, c.HeadDim
	x := make([][]float64, len(tokens))
	for t, id := range tokens {
		x[t] = append([]float64(nil), r.w["model.embed_tokens.weight"][int(id)*d:][:d]...)
	}
	for l := range c.Layers {
		p := fmt.Sprintf("model.layers.%d.", l)
		at := func(name string) []float64 { return r.w[p+name] }
		q, k, v := make([][]float64, len(x)), make([][]float64, len(x)), make([][]float64, len(x))
		for t := range x {
			h := r.norm(x[t], at("input_layernorm.weight"))
			q[t] = matvec(at("self_attn.q_proj.weight"), h, at("self_attn.q_proj.bias"))
			k[t] = matvec(at("self_attn.k_proj.weight"), h, at("self_attn.k_proj.bias"))
			v[t] = matvec(at("self_attn.v_proj.weight"), h, at("self_attn.v_proj.bias"))
			for _, part := range []struct {
				x []float64
				w string
			}{{q[t], "self_attn.q_norm.weight"}, {k[t], "self_attn.k_norm.weight"}} {
				for h := 0; h < len(part.x); h += hd {
					head := part.x[h : h+hd]
					if w := at(part.w); w != nil {
						copy(head, r.norm(head, w))
					}
					r.rope(head, t)
				}
			}
		}
		for t := range x {
			attn := make([]float64, c.Heads*hd)
			for h := range c.Heads {
				g := h / (c.Heads / c.KVHeads)
				scores, top := make([]float64, t+1), math.Inf(-1)
				for u := range scores {
					for i := range hd {
						scores[u] += q[t][h*hd+i] * k[u][g*hd+i] / math.Sqrt(float64(hd))
					}
					top = math.Max(top, scores[u])
				}
				sum := 0.0
				for u := range scores {
					scores[u] = math.Exp(scores[u] - top)
					sum += scores[u]
				}
				for u := range scores {
					for i := range hd {
						attn[h*hd+i] += scores[u] / sum * v[u][g*hd+i]
					}
				}
			}
			for i, y := range matvec(at("self_attn.o_proj.weight"), attn, nil) {
				x[t][i] += y
			}
		}
		for t := range x {
			h := r.norm(x[t], at("post_attention_layernorm.weight"))
			gate, up := matvec(at("mlp.gate_proj.weight"), h, nil), matvec(at("mlp.up_proj.weight"), h, nil)
			for i, g := range gate {
				gate[i] = g / (1 + math.Exp(-g)) * up[i]
			}
			for i, y := range matvec(at("mlp.down_proj.weight"), gate, nil) {
				x[t][i] += y
			}
		}
	}
	head := r.w["lm_head.weight"]
	if c.Tied {
		head = r.w["model.embed_tokens.weight"]
	}
	for t := from - 1; t < len(tokens)-1; t++ {
		z := matvec(head, r.norm(x[t], r.w["model.norm.weight"]), nil)
		top := math.Inf(-1)
		for i := range z {
			z[i] /= temperature
			top = math.Max(top, z[i])
		}
		sum, dot := 0.0, 0.0
		for _, v := range z {
			sum += math.Exp(v - top)
			dot += v * math.Exp(v-top)
		}
		lse := top + math.Log(sum)
		lp = append(lp, z[tokens[t+1]]-lse)
		ent = append(ent, lse-dot/sum)
	}
	return lp, ent
}
