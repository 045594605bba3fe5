// Package document reads JSON objects strictly, member by member, for documents
// in which nothing may be lost silently: a repeated member is reported, and the
// reader sees every name. What the members mean is its users' business.
package document
