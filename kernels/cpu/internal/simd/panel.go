package simd

// A panel holds `width` lanes of an operand for each step of a block of k: rows
// of op(A) or columns of op(B), step after step. Lanes past the operand's edge
// hold anything: no lane of a tile depends on another, and they are not stored.

// packRows fills dst[p*stride + lane] = x[(first+lane)*ld + from + p] for count
// lanes and steps from..to: lanes are rows of x, steps its columns.
func packRows(level Level, dst []float32, stride int, x []float32, ld, first, count, from, to int) {
	k := to - from
	dst = dst[:k*stride]
	done := 0 // lanes packed
	if level >= AVX2 {
		// The last row's eighth column block must lie within x.
		for ; done+8 <= stride && done < count; done += 8 {
			row := (first + done) * ld
			if row+7*ld+to > len(x) {
				break
			}
			if blocks := k / 8; blocks > 0 {
				packTranspose8(blocks, &dst[done], 4*stride, &x[row+from], 4*ld)
			}
			for p := k &^ 7; p < k; p++ {
				for l := range 8 {
					dst[p*stride+done+l] = x[row+l*ld+from+p]
				}
			}
		}
	}
	for lane := done; lane < stride; lane++ {
		if lane >= count {
			for p := range k {
				dst[p*stride+lane] = 0
			}
			continue
		}
		row := x[(first+lane)*ld+from:][:k]
		for p, v := range row {
			dst[p*stride+lane] = v
		}
	}
}

// packColumns fills dst[p*stride + lane] = x[(from+p)*ld + first + lane] for count
// lanes: lanes are columns of x, steps its rows.
func packColumns(level Level, dst []float32, stride int, x []float32, ld, first, count, from, to int) {
	k := to - from
	dst = dst[:k*stride]
	done := 0 // steps packed
	if level >= AVX2 {
		done = k
		// Reading whole vectors runs past a narrow last panel; within x that is
		// harmless, beyond it the last steps are copied one by one.
		for done > 0 && (from+done-1)*ld+first+stride > len(x) {
			done--
		}
		if done > 0 {
			src := &x[from*ld+first]
			switch stride {
			case 8:
				packCopy8(done, &dst[0], src, 4*ld)
			case 16:
				packCopy16(done, &dst[0], src, 4*ld)
			case 32:
				packCopy32(done, &dst[0], src, 4*ld)
			}
		}
	}
	for p := done; p < k; p++ {
		n := copy(dst[p*stride:p*stride+count], x[(from+p)*ld+first:])
		clear(dst[p*stride+n : (p+1)*stride])
	}
}

// packA packs rows [first, first+count) of op(A) over steps [from, to).
func (o *operands) packA(level Level, dst []float32, stride, first, count, from, to int) {
	if o.transA {
		packColumns(level, dst, stride, o.a, o.lda, first, count, from, to)
	} else {
		packRows(level, dst, stride, o.a, o.lda, first, count, from, to)
	}
}

// packB packs columns [first, first+count) of op(B) over steps [from, to).
func (o *operands) packB(level Level, dst []float32, stride, first, count, from, to int) {
	if o.transB {
		packRows(level, dst, stride, o.b, o.ldb, first, count, from, to)
	} else {
		packColumns(level, dst, stride, o.b, o.ldb, first, count, from, to)
	}
}

// grow returns a slice of n elements, reusing buf when it is large enough.
func grow(buf []float32, n int) []float32 {
	if cap(buf) < n {
		return make([]float32, n)
	}
	return buf[:n]
}
