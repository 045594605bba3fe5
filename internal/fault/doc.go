// Package fault holds the error kinds that every layer of trainerd shares.
//
// A kind is attached where the cause is known (the decoder that found the bad
// row, the store that refused the write). The server maps kinds to HTTP
// statuses in one table and turns Fields into the "errors" member of an
// RFC 9457 problem document. Nothing in this package knows about HTTP.
package fault
